"""The only code that knows what a training state is, and the only place for private Lightning API.

The run:

``driver``        the callback that runs a search inside a Trainer: its options, and Lightning's hooks
``live``          the search, from the start of a training to its end
``conversation``  what the search and the run tell each other
``segment``       the piece of real training that is going on
``lr``            writes learning rates
``grad_norms``    the gradient norm of each step
``length``        how long the run is
``checks``        what can be wrong with a Trainer or an option

Private steps:

``probe``         answers a search's requests
``line``          answers those along one update
``steps``         optimizer steps without the Trainer's loop
``batches``       what they are made on
``loaders``       where these come from, while the user's own loaders stand still
``evaluate``      validation by hand
``permute``       the weights in another order: a network that has learnt nothing
``batch_norm``    running statistics, taken anew for an evaluation
``quiet``         nobody hears of a private step

The training state:

``state``         capture it and put it back, in place
``tallies``       what stays as it is when the run goes back
``randomness``    random number generators, also those that a user's data hold
``files``         where the captured bytes lie: device, pinned CPU, disk
``kept``          states to go back to, also after a resume

What the user sees:

``announce``      all of it
``progress``      what is being tried, in the user's progress bar
``figure_log``    figures and the account, for the user's logger

For the rest:

``ranks``         reduce and broadcast
``compat``        private names of Lightning and torch
"""
