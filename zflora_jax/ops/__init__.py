"""Operations in the forms that compilers run best, each beside a plain reference that a test
compares it with.

No modules and no parameter trees; a trick for a compiler or a device lives here and nowhere else.
"""
