"""Pure rules of the field: no await, no clock, no environment, no logging, no driver."""
