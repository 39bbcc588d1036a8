"""extract: tasks and employees of a database that has no change feed, into task_events and employees.

No stage: a service that one worker at a time runs. Off unless `extract.url` names the database.
"""

from preservarium.extract.service import ExtractService
from preservarium.streaming.app import app

if app.live().extract.url.get_secret_value():
    app.add_dependency(ExtractService(app.live, app.publisher))
