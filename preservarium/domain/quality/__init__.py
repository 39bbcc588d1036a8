"""How far a reading can be trusted: tests after QARTOD, order of arrival, counters, anomalies.

May import the domain and `preservarium.errors`.
"""
