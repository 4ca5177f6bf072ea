"""What ``bench.load`` and ``bench.versus`` are made of.

Both: ``clients`` holds allocations, ``traffic`` sends and receives, ``tally`` makes numbers of what
arrived and looks for the lossless rate, ``process`` reads what a process has cost, ``mmsg`` reaches
system calls that the socket module lacks, ``table`` is for people. The comparison alone:
``netns`` and ``servers`` set the scene, ``comparison``, ``plot`` and ``report`` tell what came out.
"""
