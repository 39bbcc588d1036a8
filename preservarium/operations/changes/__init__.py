"""Changes of what is stored: shadow replays and corrections, carried out and taken back.

`deriving` makes readings and alarms of raw records in memory, `shadow` has several processes do it and says what differs, `correcting` makes
changes of what people say, `promoting` carries a change out and takes it back, `following` makes windows anew. May import what operations may.
"""
