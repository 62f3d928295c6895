"""The code that runs inside the model server. The archive contains this package unchanged.

It imports no other package of this repository. Code that takes the handler somewhere belongs in
`deploy`.
"""
