"""The control socket of a mount: JSON-RPC 2.0, one object per line, for its owner and root.

`places` says where it is and `listener` puts it there, `protocol` has what may be said, `schema` which methods there
are, `methods` what they do; `server` serves them under trio, `client` asks. What a client imports needs no trio.
"""
