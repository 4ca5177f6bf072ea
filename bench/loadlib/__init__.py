"""Modules of ``bench.load`` and ``bench.versus``.

Both: ``clients`` holds allocations, ``traffic`` sends and receives, ``tally`` makes numbers of what
arrived and looks for the lossless rate, ``process`` reads what a process has cost, ``mmsg`` reaches
system calls that the socket module lacks, ``table`` prints results. The comparison alone:
``netns`` and ``servers`` start the servers; ``comparison``, ``plot`` and ``report`` write results.
"""
