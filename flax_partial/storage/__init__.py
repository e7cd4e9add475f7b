"""Where bytes are stored: the only room that touches files, locks and tensorstore.

Other rooms use all of its modules; none of them depends on what a save or a load is.
"""
