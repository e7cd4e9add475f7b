"""What ends a session: finalize and abort; and status, which looks at it.

Others use the public calls only.
"""
