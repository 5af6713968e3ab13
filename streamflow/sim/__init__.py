"""The simulator: the product's own workers and clients in worlds whose time, chance, log and disks come from a seed.

    loop.py        the event loop of one simulated process
    world.py       processes, virtual time, and which of them goes on next
    cluster.py     what brokers keep: topics, groups; how likely each fault of the way there is
    log.py         one process's handle to it: the log port
    host.py        the clock and the disk of one worker
    machines.py    where workers live, one process after another
    faults.py      what goes wrong, fault by fault
    programs.py    random workflows, and what they must return
    rules.py       what must hold after every event (design.md, section 9)
    simulation.py  the story of one seed: the driver, the account at the end
    search.py      many seeds, and the fewest faults that make one fail

DESIGN.md says how a world works, and what it found.
"""
