"""Every contender on every task, under one protocol: what is run, how it is judged, and its pictures."""
