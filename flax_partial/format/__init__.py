"""What is on disk, and the rules: bytes and dataclasses in, bytes and dataclasses out. Pure.

Other rooms use all of its modules; nothing in here opens a file or waits.
"""
