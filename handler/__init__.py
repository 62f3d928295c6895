"""What runs inside the model server: the archive contains this package unchanged.

It imports nothing else of this repository. Code that takes the handler somewhere belongs in
`deploy`.
"""
