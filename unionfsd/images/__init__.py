"""Images: OCI and Docker images to layer directories in overlayfs's format, and back.

Rules this package obeys:

- It knows nothing of the union or of FUSE; it may run while neither can. What is mounted is mounted by `unionfsd`.
- Whatever comes from outside (archives, registries, layouts) is hostile until a digest says otherwise, and its names
  are hostile even then: extraction goes one component at a time beneath a directory descriptor (`beneath`, `unpack`).
- What stands under its final name in a store is whole: staged, synced, renamed (`store`).
"""
