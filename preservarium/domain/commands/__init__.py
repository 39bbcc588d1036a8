"""Commands to devices, from what may be asked to the bytes that a network takes.

| file | what |
|---|---|
| machine.py | the life of a command: states, events, what is refused when |
| lines.py | the lines of `device_commands`, checked |
| confirm.py | what confirms a command |
| profile.py | how a device takes commands: its `downlink` in the registry |
| alarm_requests.py | commands that alarms ask for |
| device.py | the commands of one device: the queue, what is under way, the state document |
| downlinks.py | a try as each network takes it, and what networks report |
| fields.py | checks of single fields |

May import the domain and `preservarium.errors`.
"""
