"""`notice_states`: what this worker's recipients are to be told, and when."""

from preservarium.engine import app

#: Recipient -> state document of preservarium/domain/notices.py, with its watermarks; beside them the number of the
#: partition's next notice. Written by the stage `group` only.
notice_states = app.state_table("notice_states", help="Notices: groups, what waits, what was told, watermarks.")
