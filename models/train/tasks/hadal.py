"""Questions about Hadal itself: a fixed set of facts, each asked in several ways."""

from sample import Turn

# answer: the ways to ask for it.
FACTS = {
    "Hadal serves DeepSeek-V3 on Kubernetes, with prompt processing and token generation in two pools of their own.": ("What is Hadal?", "What does Hadal do?", "Describe Hadal."),
    "Hadal serves DeepSeek-V3, V3-0324, R1 and V3.1: they are the same network.": ("Which models does Hadal serve?", "What models can Hadal run?", "Which networks does Hadal support?"),
    "Hadal is written in Rust; its GPU kernels are CUDA C++.": ("What language is Hadal written in?", "In which language is Hadal written?", "What is Hadal written in?"),
    "There are two pools: prefill and decode.": ("Which pools does Hadal have?", "How many pools are there in Hadal?", "What are Hadal's pools called?"),
    "The prefill pool processes prompts and fills the KV cache.": ("What does the prefill pool do?", "What is the prefill pool for?", "What is a prefill worker for?"),
    "The decode pool generates tokens, one step after another.": ("What does the decode pool do?", "What is the decode pool for?", "What is a decode worker for?"),
    "The router picks the workers, speaks OpenAI HTTP and gRPC, and decides where redundant experts go.": ("What does the router do?", "What is the router for?", "What is the job of Hadal's router?"),
    "The operator turns a DeepSeekDeployment into a prefill pool and a decode pool.": ("What does the operator do?", "What is the operator for?", "What is the job of Hadal's operator?"),
    "The operator is built with kube-rs.": ("What is the operator built with?", "Which library does the operator use?", "Which Kubernetes library does Hadal use?"),
    "A KV block holds 64 tokens of one layer.": ("How many tokens are in a KV block?", "How big is a KV block?", "What is the size of a KV block?"),
    "A KV block stores 576 latent values for each token.": ("How many values does a KV block store per token?", "How many latent values does a token have?", "How wide is the latent cache?"),
    "The KV cache moves from prefill to decode over gRPC, layer by layer.": ("How does the KV cache move?", "How does the KV cache get from prefill to decode?", "How is the KV cache transferred?"),
    "A lease is a set of decode blocks reserved for a transfer; it expires by itself.": ("What is a lease?", "What is a lease in Hadal?", "What does lease mean?"),
    "An incarnation is one life of a worker process.": ("What is an incarnation?", "What does incarnation mean in Hadal?", "What is an incarnation in Hadal?"),
    "A revision is the hash of everything that prefill and decode must share.": ("What is a revision?", "What does revision mean in Hadal?", "What is a revision in Hadal?"),
    "A pool is all prefill capacity, or all decode capacity, of one deployment.": ("What is a pool?", "What does pool mean in Hadal?", "What is a pool in Hadal?"),
    "A unit is one replica of a pool: the ranks that step together.": ("What is a unit?", "What does unit mean in Hadal?", "What is a unit in Hadal?"),
    "A rank is one device of a unit, such as a GPU.": ("What is a rank?", "What does rank mean in Hadal?", "What is a rank in Hadal?"),
    "A slot is a place on a rank that holds one expert's weights.": ("What is a slot?", "What does slot mean in Hadal?", "What is an expert slot?"),
    "A replica is one of the slots that hold the same logical expert.": ("What is a replica?", "What is an expert replica?", "What does replica mean for experts?"),
    "A placement says, for each layer, which logical expert each slot holds.": ("What is a placement?", "What does placement mean in Hadal?", "What is an expert placement?"),
    "A generation is the version number of a placement; it only grows.": ("What is a generation?", "What is the generation of a placement?", "What does generation mean in Hadal?"),
    "Decode.Reserve takes blocks for the prompt, or says no at once.": ("What does Decode.Reserve do?", "What is Decode.Reserve?", "What happens in Decode.Reserve?"),
    "Prefill.Run computes the prompt in chunks and sends each layer's KV blocks as soon as they are done.": ("What does Prefill.Run do?", "What is Prefill.Run?", "What happens in Prefill.Run?"),
    "KvTransfer.Push carries KV blocks over a gRPC stream with a checksum for each block.": ("What does KvTransfer.Push do?", "What is KvTransfer.Push?", "What carries the KV blocks?"),
    "The first token comes from prefill and goes to the client at once.": ("Where does the first token come from?", "Who makes the first token?", "Which worker sends the first token?"),
    "The decode worker verifies every block, commits the lease and joins the request to its running batch.": ("What does the decode worker do after a transfer?", "What happens when all blocks have arrived?", "When does a request join the running batch?"),
    "A lost prefill is retried on another worker.": ("What happens when a prefill worker dies?", "What if a prefill worker is lost?", "What happens to a lost prefill?"),
    "Its requests are replayed on another decode worker, with no token lost or doubled.": ("What happens when a decode worker dies?", "What if a decode worker is lost?", "What happens to the requests of a lost decode worker?"),
    "The client sees a pause or a typed error, never a hang and never a token twice.": ("What does the client see when a worker dies?", "What does a client notice of a crash?", "Can a client get a token twice?"),
    "A combined worker serves both phases: prefill and decode.": ("What is combined mode?", "What does a combined worker do?", "What is a combined worker?"),
    "Run cargo run --release -- up.": ("How do I start Hadal?", "How do I run Hadal?", "Which command starts Hadal?"),
    "Run cargo xtask test.": ("How do I run the tests?", "Which command runs the tests?", "How are Hadal's tests started?"),
    "hadal up starts a prefill worker, two decode workers and a router on this machine.": ("What does hadal up do?", "What does hadal up start?", "What is hadal up for?"),
    "hadal chat talks to a running router from the terminal.": ("What does hadal chat do?", "What is hadal chat for?", "How do I chat in the terminal?"),
    "hadal bench is a load generator; it prints latency and throughput percentiles.": ("What does hadal bench do?", "What is hadal bench for?", "How do I measure Hadal?"),
    "hadal trace writes logits, expert choices and cache entries, to compare with other implementations.": ("What does hadal trace do?", "What is hadal trace for?", "How do I compare Hadal with other implementations?"),
    "hadal plan checks a parallel layout before it is used.": ("What does hadal plan do?", "What is hadal plan for?", "How do I check a layout?"),
    "The router speaks the OpenAI HTTP API and gRPC.": ("Which APIs does Hadal speak?", "Which protocols does the router speak?", "What API does Hadal offer?"),
    "Yes, the router speaks the OpenAI API.": ("Is Hadal compatible with OpenAI?", "Can I use the OpenAI client with Hadal?", "Does Hadal speak the OpenAI API?"),
    "No, the CPU backend runs everything without a GPU.": ("Do I need a GPU to run Hadal?", "Does Hadal need a GPU?", "Is a GPU required for Hadal?"),
    "No, hadal up runs everything on one machine without Kubernetes.": ("Do I need Kubernetes to run Hadal?", "Does Hadal need Kubernetes?", "Is Kubernetes required for Hadal?"),
    "There are two backends: cpu and cuda.": ("Which backends does Hadal have?", "How many kernel backends are there?", "Which kernel backends exist?"),
    "The CUDA kernels are driven through cudarc.": ("What drives the CUDA kernels?", "How does Hadal call CUDA?", "Which crate drives CUDA?"),
    "DeepSeekDeployment, DeepSeekPoolScaler and ExpertPlacement.": ("Which custom resources does Hadal have?", "What are Hadal's custom resources?", "Which CRDs does Hadal define?"),
    "The short name of DeepSeekDeployment is dsd.": ("What is the short name of DeepSeekDeployment?", "What is dsd?", "What does dsd stand for?"),
    "The short name of DeepSeekPoolScaler is dsps.": ("What is the short name of DeepSeekPoolScaler?", "What is dsps?", "What does dsps stand for?"),
    "The short name of ExpertPlacement is dsep.": ("What is the short name of ExpertPlacement?", "What is dsep?", "What does dsep stand for?"),
    "A unit is a StatefulSet with a headless Service.": ("What is a unit in Kubernetes?", "How does Kubernetes run a unit?", "Which Kubernetes object is a unit?"),
    "Prometheus metrics are exported by every process.": ("Which metrics does Hadal export?", "How is Hadal monitored?", "Where do Hadal's metrics come from?"),
    "Workers count the tokens for each logical expert and layer at every step.": ("How is expert load measured?", "How does Hadal measure expert load?", "Who counts the tokens per expert?"),
    "The placement modes are Off, Observe, Advise and Auto.": ("Which placement modes are there?", "What are the placement modes?", "Which modes does the placement controller have?"),
    "In Advise mode Hadal plans a placement and waits for approval.": ("What does Advise mode do?", "What is Advise mode?", "What happens in Advise mode?"),
    "In Auto mode Hadal plans placements and rolls them out by itself.": ("What does Auto mode do?", "What is Auto mode?", "What happens in Auto mode?"),
    "In Observe mode Hadal measures expert load and changes nothing.": ("What does Observe mode do?", "What is Observe mode?", "What happens in Observe mode?"),
    "No, greedy output before and after a switch is the same.": ("Does a new placement change the output?", "Do answers change when experts move?", "Does moving experts change the tokens?"),
    "No, the same tokens come out of every layout.": ("Does a parallel layout change the output?", "Does the layout change the answers?", "Do different layouts give different tokens?"),
    "Tensor, sequence, data and expert parallelism.": ("Which kinds of parallelism does Hadal have?", "Which parallel layouts are there?", "What kinds of parallelism can a layout use?"),
    "MLA is multi-head latent attention: it caches one small latent vector per token instead of keys and values.": ("What is MLA?", "What does MLA mean?", "What is multi-head latent attention?"),
    "MTP is multi-token prediction: an extra layer that drafts the token after the next.": ("What is MTP?", "What does MTP mean?", "What is multi-token prediction?"),
    "The gate keeps 4 of 8 groups and then picks 8 experts.": ("How does the gate choose experts?", "How many experts does the gate pick?", "How does the expert gate work?"),
    "DeepSeek-V3 has 256 routed experts in each MoE layer and one shared expert.": ("How many experts does DeepSeek-V3 have?", "How many routed experts are in DeepSeek-V3?", "How many experts are in a layer of DeepSeek-V3?"),
    "DeepSeek-V3 has 61 layers; the first 3 are dense.": ("How many layers does DeepSeek-V3 have?", "How many dense layers does DeepSeek-V3 have?", "How deep is DeepSeek-V3?"),
    "The weights are FP8 E4M3 in blocks of 128 by 128, each with a scale.": ("Which number format do the weights use?", "How are the weights stored?", "What is the weight format?"),
    "YaRN stretches rotary positions so that longer contexts work.": ("What is YaRN?", "What does YaRN do?", "What is YaRN for?"),
    "Separating prefill from decode lets each pool be sized for its own work.": ("Why are prefill and decode separate?", "Why does Hadal have two pools?", "What is the use of two pools?"),
    "Hadal is free under the Apache-2.0 license.": ("What license does Hadal have?", "Under which license is Hadal?", "Is Hadal free?"),
    "The hadal zone is the deepest part of the ocean.": ("What does the name Hadal mean?", "Where does the name Hadal come from?", "Why is it called Hadal?"),
    "Each block has a checksum; bad bytes are never used.": ("How are KV blocks protected?", "What protects a KV block?", "What happens to corrupted KV blocks?"),
    "The simulator runs the router and workers in one thread with crashes and partitions, by seed.": ("What does the simulator do?", "What is the simulator for?", "How are crashes tested?"),
    "The worker finishes its requests, refuses new ones and then exits.": ("What does draining mean?", "What happens when a worker drains?", "What does a worker do on SIGTERM?"),
}

QUESTIONS = [(question, answer) for answer, questions in FACTS.items() for question in questions]
BEFORE = ("", "", "", "Please tell me: ", "Tell me, ", "A question: ", "Quick question: ", "I wonder: ", "Hello! ", "Hi. ")
AFTER = ("", "", "", " Thanks.", " Please answer briefly.", " I would like to know.", " Thank you!")


def dressed(rng, question: str) -> str:
    """The question with a few words around it, and now and then in lower case or without its last sign."""
    before, after = rng.choice(BEFORE), rng.choice(AFTER)
    if before.endswith((": ", ", ")) and not question.startswith(("Hadal", "MLA")):
        question = question[0].lower() + question[1:]
    if not before and not after and rng.random() < 0.3:
        question = question[:-1]
    return before + question + after


def facts(rng) -> Turn:
    question, answer = rng.choice(QUESTIONS)
    return Turn(dressed(rng, question), answer)
