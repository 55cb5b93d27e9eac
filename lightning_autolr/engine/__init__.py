"""The only code that knows what a training state is, and the only place for private Lightning API.

``state``    capture and put back a training state, in place           ``lr``        write learning rates
``files``    where the captured bytes lie: device, pinned CPU, disk    ``ranks``     reduce and broadcast
``steps``    private optimizer steps                                   ``quiet``     nobody hears of a private step
``batches``  the batches of private steps                              ``probe``     answers a search's requests
``evaluate`` validation by hand                                        ``driver``    the callback that runs a search
"""
