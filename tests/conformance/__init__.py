"""The promises of a site, checked for every model of the zoo. `python -m tests.conformance` prints the table.

Every check is a function of one `Setting` that raises AssertionError; `promises.PROMISES` names them, the tests and the table call the same ones.
"""
