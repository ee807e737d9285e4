"""Every key of a run, declared once: its default, its meaning, its unit.

Other configs start from this one and change what differs. On the command line:
--config=configs/NAME.py --config.optim.learning_rate=3e-4
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of the initialisation, the order of the data and dropout
    c.init_from = ""  # begin with the weights of whatever gpt2_jax.load takes; "": none
    c.steps = 1000  # updates
    c.batch_size = 16  # examples of a global batch
    c.batch_warmup = ()  # ((TOKENS, SIZE), ...): until so many tokens, so many examples
    c.block_size = 256  # tokens of an example
    c.device_batch_size = 0  # examples on a device at a time, the batch being cut into
    # microbatches that are added up; 0: all at once
    c.dtype = "float32"  # of the computation: float32 or bfloat16
    c.attention = "auto"  # or xla, cudnn (NVIDIA, bfloat16), pallas (TPU)
    c.remat = "none"  # for less memory compute again: none, dots (all but matrix
    # products), block (all of a layer)
    c.log_every = 10  # steps between records of the training metrics
    c.wandb_project = ""  # Weights & Biases has them too, in this project; "": no

    # As in GPT2Config. With init_from the first two resize what it has, dropout rates
    # apply, and the rest is not looked at.
    m = c.model = ConfigDict()
    m.vocab_size = 0  # 0: the tokenizer's, or init_from's; more pads the vocabulary
    m.n_positions = 0  # 0: block_size, or init_from's
    m.n_embd = 256
    m.n_layer = 4
    m.n_head = 4
    m.n_inner = config_dict.placeholder(int)  # MLP width; None: 4 * n_embd
    m.bias = True  # in linears and LayerNorms
    m.activation_function = "gelu_new"  # GPT-2's; nanoGPT's is gelu
    m.scale_attn_weights = True  # scores times 1 / sqrt(head_dim)
    m.scale_attn_by_inverse_layer_idx = False  # and times 1 / (layer + 1)
    m.layer_norm_epsilon = 1e-5
    m.initializer_range = 0.02
    m.embd_pdrop = 0.0
    m.attn_pdrop = 0.0
    m.resid_pdrop = 0.0

    d = c.data = ConfigDict()
    d.kind = "text"  # or sft: a file of examples, see gpt2_jax/data/sft.py
    d.template = ""  # of sft's messages, as "{role}: {content}\n"
    d.path = ""  # what prepare_data.py --path takes, a prepared folder, or shards of
    # nanoGPT, llm.c or modded-nanogpt (docs/data.md); "": built-in corpus
    d.tokenizer = ""  # sentencepiece, char, bytes, or path of a given one; "": that of
    # init_from, without it sentencepiece
    d.vocab_size = 4096  # of a tokenizer to train; 0: what the tokenizer has
    d.mixture = ()  # ((PREPARED_FOLDER, WEIGHT), ...) in the place of path
    d.packing = "flat"  # windows of the text as it comes; or documents: attention and
    # positions begin anew at each end of text
    d.splits = (0.9, 0.05, 0.05)  # of the text: train, validation, test

    o = c.optim = ConfigDict()
    o.name = "adamw"  # or muon: Muon for kernels, AdamW for the rest
    o.learning_rate = 1e-3  # peak
    o.muon_learning_rate = 0.0  # peak of the kernels under Muon; 0: learning_rate
    o.schedule = "cosine"  # after the warmup: cosine, wsd, linear or constant
    o.min_learning_rate = 1e-4  # at the last step, unless the schedule is constant
    o.warmup_steps = 100
    o.decay_steps = 0  # wsd holds the peak until these last steps
    o.b1 = 0.9
    o.b2 = 0.95
    o.eps = 1e-8
    o.weight_decay = 0.1  # on tensors with ndim >= 2
    o.clip_norm = 1.0  # of the global gradient
    o.state_dtype = "float32"  # of the first moment: float32 or bfloat16
    o.ema_decay = 0.0  # of an exponential average of the parameters; 0: none
    o.max_skipped = 10  # updates in a row that may be skipped: loss or gradient bad
    o.max_loss_z = 0.0  # skip losses so many deviations above their mean; 0: none

    o.lr_scales = ()  # ((PATTERN, FACTOR), ...): the rate of parameters by the first
    # regular expression found in their path, as h_3/attn/c_attn/kernel; 0: frozen

    r = c.lora = ConfigDict()  # adapters in the place of init_from's parameters
    r.rank = 0  # 0: all parameters are trained
    r.alpha = 16.0  # adapters are scaled by alpha / rank
    r.dropout = 0.0  # of what goes into them
    r.kernels = ("c_attn", "c_proj", "c_fc")  # or attn/c_proj, mlp/c_proj

    s = c.mesh = ConfigDict()  # devices along each axis; one of them -1: the rest
    s.data = -1
    s.fsdp = 1
    s.tensor = 1

    e = c.eval = ConfigDict()
    e.every = 100  # steps
    e.examples = 320  # from the start of the validation split; 0: all
    e.patience = 0  # evaluations without a lower loss that end the run; 0: none do
    e.sample_tokens = 0  # tokens to generate at each evaluation; 0: none
    e.sample_prompt = ""  # that they follow; "": the end of a text

    k = c.checkpoint = ConfigDict()
    k.every = 100  # steps
    k.keep_last = 2  # and the one with the best validation loss

    return c.lock()
