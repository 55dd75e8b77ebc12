"""What must not go wrong, provoked: each module makes a promise in its docstring, and counts how it was tried.

`python -m tests.reliability` runs them at night length and writes docs/RELIABILITY.md of the docstrings and the counts.
"""
