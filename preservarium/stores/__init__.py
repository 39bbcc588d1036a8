"""The only sockets to databases.

`timescale` writes readings to PostgreSQL, in the rows of `timescale_rows`; `upkeep` keeps what they are stored in; `migrate/` brings
both databases' schemas up to date.
`views` and `device_reads` are what the console reads.

May import the domain and the ground.
"""
