"""`employees`: who works on files, as their source tells it."""

from preservarium.streaming.app import app

#: Employee code -> the newest EmployeeRow as JSON, its version in hexadecimal digits. Written by the employees agent only.
employees = app.state_table(
    "employees",
    key="employee code",
    help="Employees: name, department, whether active; the newest change of each.",
)
