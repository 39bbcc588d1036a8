"""Pure rules of the field, one folder a subject: no await, no clock, no environment, no logging, no driver.

May import nothing but the domain and `preservarium.errors`.
"""
