"""What stands between the network and our HTTP handlers, in a worker and in `preservarium connect http`.

- server.py   the web server: deadlines, limits of a client, refusals as JSON
- hosts.py    under which names we are served, and whose pages may ask
- bodies.py   bodies, unpacked under limits
- rights.py   what a handler says of who may ask it
- clients.py  who is one client

May import the ground.
"""
