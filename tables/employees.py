"""`employees`: who works on files, as their source tells it."""

from preservarium.engine import app

#: Employee code -> the newest EmployeeRow as JSON, its version in hexadecimal digits. Written by the employees agent only.
employees = app.state_table("employees", help="Employees: name, department, whether active; newest change of each.")
