"""employees: the topic of the same name into a look-up table of this worker's partitions."""

from preservarium import topics
from preservarium.stages.employees import fold_employees
from preservarium.streaming.app import app
from preservarium.streaming.stage import Batch, Effects
from tables.employees import employees


@app.stage(topics.EMPLOYEES, name="employees", state=employees)
async def keep(batch: Batch) -> Effects:
    """Keep the newest change of each employee, in whichever order they come."""
    return fold_employees(
        batch, lambda key: employees.get(batch.partition, key), table=employees.name, now_us=app.clock.now_us()
    )
