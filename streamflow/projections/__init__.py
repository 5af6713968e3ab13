"""Read models, folded from the log: what is seen of a run (`views`), and how that is asked for (`queries`)."""
