"""Slow, explicit, float64 versions of what the library computes fast, written from the formulas alone.

Nothing here imports the library. Dense Kronecker operators cost O((mn)^3), so shapes stay small.
"""
