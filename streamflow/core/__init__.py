"""The core decides: commands and outcomes in, turns and effects out. No clock, no IO, no threads, no chance.

Everything here is synchronous and sees only its arguments; time comes in as `at` (milliseconds since the epoch) and
goes out as a deadline. DESIGN.md beside this file says why each part is the way it is.
"""
