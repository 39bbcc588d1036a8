"""The peers that bench/e2e.py runs beside Preservarium."""
