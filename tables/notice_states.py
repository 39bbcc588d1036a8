"""`notice_states`: what this worker's recipients are to be told, and when."""

from preservarium.streaming.app import app

#: Recipient -> state document of preservarium/domain/notices.py, with its watermarks; beside them the number of the
#: partition's next notice. Written by the stage `group` only.
notice_states = app.state_table(
    "notice_states",
    key="recipient",
    help="Notices: groups and their alarms, what waits, what was told, planned notices; watermarks.",
)
