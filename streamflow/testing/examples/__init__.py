"""Three workflows with their tests, to begin with: each file is one, and its tests run with nothing but pytest.

reminder.py      sleeps for 30 days: tested in milliseconds, without a clock
booking.py       steps that fail, are tried again and are undone, with a crash after every turn
checkout.py      an approval, a cancel and a time limit that race, under random faults, over many seeds
"""
