"""employees: the topic of the same name into a look-up table of this worker's partitions."""

from preservarium import topics
from preservarium.employees import fold_employees
from preservarium.engine import app
from preservarium.stage import Batch, Effects
from tables.employees import employees


@app.stage(topics.EMPLOYEES, name="employees")
async def keep(batch: Batch) -> Effects:
    """Keep the newest change of each employee, in whichever order they come."""
    return fold_employees(
        batch, lambda key: employees.get(batch.partition, key), table=employees.name, now_us=app.clock.now_us()
    )
