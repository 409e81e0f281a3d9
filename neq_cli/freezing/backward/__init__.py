"""Fewer gradients are computed: classes are swapped, kernels sliced, and the fastest is chosen.

Freezing works in loops that know nothing of it, so it changes what others see. This is the whole list: what is changed,
when, and what undoes it. What is changed for one call is undone where an exception leaves it, too.

For as long as a frozen set is in force, that is until ``step()`` or ``load_state_dict()`` of the Freezer puts another
in its place, until ``detach()``, and not inside ``suspended()``:

- Classes of modules (swapping.py, sliced_layers.py): a module with frozen neurons is of a subclass of its own class, of
  the same name, and holds its plan as an attribute. With torch.compile all that can be sliced are, from the first set
  on, in which nothing is frozen. Copies and pickles are of their own class.
- ``.grad`` of large weights with frozen rows (rows/handed_over.py): a backward pass that fills it may put a tensor of a
  class of its own there, which acts as the whole gradient.
- State of the optimiser (rows/stepping.py, writing.py), where it is one of torch's own: of some weights the trainable
  rows alone, of others with something of no meaning in frozen rows. ``state_dict()``, copies and pickles have it whole.
- Hooks on parameters, called once a gradient has been accumulated (rows/zeroed.py), where rows are frozen. In truncated
  mode, in a model that was given wrapped in DistributedDataParallel, on all others that an error may reach as well.
  They put calls off to the end of the running backward pass, and end with it.

From the making of the Freezer until ``detach()``, and kept in ``suspended()``:

- Hooks around ``step()`` and after ``load_state_dict()`` of the optimiser and of those that it wraps (rows/keeper.py,
  hold.py, freezer.py). The one that writes rows back comes first after a step. One of torch's own has hooks around
  ``state_dict()`` and a ``__getstate__`` of its instance as well.
- Hooks after ``load_state_dict()`` on every module (rows/keeper.py). Copies of the model have none that act.
- ``step`` of an optimiser that never called its base class's constructor, such as a wrapper (rows/optimizers.py): it
  calls hooks now. This is the one thing that ``detach()`` leaves: without a hook it does what it did before.

For a part of ``optimizer.step()`` (rows/stepping.py): large weights with frozen rows are their trainable rows, and the
optimiser has them alone. Then, for the rest of it, they have no gradient.

For one forward pass of the module concerned, where gradients are on:

- ``torch.nn.functional.linear`` (intercepting.py), where a module passes weights with frozen neurons to it. It is
  replaced for the process, but acts on weights of modules that run in the same thread only; the last one out of all
  threads puts it back.
- The parameters of a layer that cannot be sliced and whose neurons are all frozen (swapping.py): detached ones stand in
  their place.
- Parameters outside neurons that lie in a frozen front (swapping.py): forward passes of the model, and what a backward
  pass repeats of them, get them detached as attributes of the modules that own them. These, and the model, are of
  subclasses for that.
- ``training`` of modules that run as at inference (resting.py): off. A batch norm that is folded returns its input.

Inside of ``Freezer(...)``, ``step()`` and, where the model has changed, ``load_state_dict()``:

- ``torch.nn.functional.linear`` and hooks on layers (model/observing.py), which watch what layers put out.
- Random states, the fast path of attention, the stance of torch.compile (model/observing.py, ``undisturbed``), and
  everything that a forward pass may leave in a module (model/restoring.py); there the probe puts the tensors of the
  network before in the place of the model's.
- Hooks of ``fully_shard`` on the modules that it divides, and two methods of its states (processes/gathering.py):
  others take their places, and so do plain parameters those of sharded ones. These calls, ``state_dict()`` and the hook
  before the optimiser's step have such a model's parameters sharded first.
- ``CheckpointFunction.apply``, the kernels of attention and a dispatch mode (model/trace.py), where the model is looked
  at: when the Freezer is made, and again when the model or what the optimiser updates has changed. Parameters that the
  optimiser has require gradients meanwhile (changes.py; for ``state_dict()``, too).

Of the process, from the import on:

- The operators ``neq::apply`` and ``neq::gradients`` (compiled.py), which graphs of torch.compile call with a number.
  The table of plans by number loses an entry when its slot, which a Freezer has, is collected.
- The subclasses of modules' own classes, one for each class and purpose (swapping.py): they are kept and used again.

Of a wrapper, never of the model: the communication hook of a ``Replica`` (processes/replica.py). The mark for
parameters that DistributedDataParallel shall ignore is on the model while the wrapper is made, and off again.
"""
