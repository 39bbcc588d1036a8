"""Alarms after ISA-18.2: the state machine, rules, a device's alarms, schedules, floods, history.

May import the domain and `preservarium.errors`.
"""
