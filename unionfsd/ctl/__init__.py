"""``unionfsctl``: asks mounts through their control sockets, and clears away those whose daemon is dead.

It starts quickly because it imports what a verb needs when it is run, and neither trio nor anything of the union.
"""
