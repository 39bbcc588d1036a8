"""What a device said: messages, readings, units, instants, and how decoded values become readings.

May import the domain and `preservarium.errors`.
"""
