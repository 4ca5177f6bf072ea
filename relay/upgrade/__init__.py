"""Upgrades that lose nothing: a successor process goes on with the sockets and the state.

====================  ===================================================================
``channel``           messages between the two processes, with descriptors
``launch``            starting the program anew from disk, with its first privileges if need be
``outgoing``          what the running process does: copies all while it serves, then stops,
                      tells what has changed meanwhile, and leaves once the successor serves
``incoming``          what the successor does: reads, checks, and serves
====================  ===================================================================

In the order of time::

    running process                                successor
    SIGUSR2: starts the program    ------------->  reads the configuration
                                   <- hello -----  which format it reads
    listening sockets, secrets     -- begin ---->  holds them against its configuration, gives up
                                                   privileges, joins the portal
                                   <- next ------
    some allocations, with ports   -- portion -->  enters them; all of it again until little changes
    serves no more: what has       -- switch --->
    changed since, and the rest    <- serving ---  serves
    leaves                         -- farewell ->  tells the service manager

Until "serving" nothing has happened to what the running process has. Whatever goes wrong, it serves
on: the successor tells why (a message "failed"), or it just ends, or it takes too long. Datagrams
that arrive after the switch wait in the queues of the sockets, which are the same for both.

A successor, not exec in place: a new program that turns out to be broken must not take the old one
with it, and Python takes longer to start than a call can wait.
"""
