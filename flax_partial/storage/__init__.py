"""Where bytes live: the only room that touches files, locks and tensorstore.

Other rooms use all of its modules; none of them knows what a save or a load is.
"""
