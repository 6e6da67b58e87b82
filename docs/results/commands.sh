# What the results in this folder come from, from the repository's root: `bash docs/results/commands.sh`, or any of its
# commands alone. One that was stopped goes on when it is run again. `data` holds the data sets as `--data-dir` of each
# task says; without it they are loaded from the hub. The model is SmolLM2-135M-Instruct where none is named.
set -e

# How well books are predicted (SelfExtend, table 1 and figure 2)
ropewalk eval perplexity --data-dir data --lengths 4k,8k,16k,24k,32k --books 15 --windows 4 \
    --method unmodified --method selfextend --method self \
    --method "self(capacity=16, rate=0.02, window=1024, grouping='distance')" --method rerope --method leaky-rerope \
    --method linear --method ntk --method dynamic-ntk --method yarn --method sliding-window --method infinite \
    --batch-size 4 --chunk 32768 --output docs/results/perplexity
ropewalk eval perplexity --mode positions --data-dir data --lengths 32k --books 15 \
    --method unmodified --method selfextend --method self --method rerope --method dynamic-ntk --method yarn \
    --method infinite --chunk 32768 --output docs/results/perplexity-by-position

# Whether a pass key is found (figures 4 and 6)
ropewalk eval passkey --lengths 4k,8k,12k,16k,20k,24k,28k,32k --depths 10 --samples 5 \
    --method unmodified --method selfextend --method self --method rerope --method dynamic-ntk --method yarn \
    --method infinite --chunk 32768 --output docs/results/passkey
ropewalk eval passkey-length --length 16k --samples 20 \
    --method unmodified --method selfextend --method self --method rerope --method yarn \
    --batch-size 10 --output docs/results/passkey-length

# What `start` trades
ropewalk eval passkey --lengths 4k,8k,16k,24k --depths 10 --samples 5 --method unmodified \
    --method "selfextend(group_size=8, window=1024, start={0, 1024, 4096, 8192})" \
    --chunk 32768 --output docs/results/start-passkey
ropewalk eval perplexity --data-dir data --lengths 1k,4k,8k,16k,24k --books 15 --windows 4 --method unmodified \
    --method "selfextend(group_size=8, window=1024, start={0, 1024, 4096, 8192})" \
    --batch-size 4 --chunk 32768 --output docs/results/start-perplexity

# Group size and neighbor window, and eq. 5 (figures 5, 8 and 10)
ropewalk eval needle --data-dir data --lengths 16k --depths 10 --samples 3 --method unmodified \
    --method "selfextend(group_size={2, 4, 8, 16, 32}, window={512, 1024, 2048, 4096})" \
    --batch-size 10 --output docs/results/needle-sweep
ropewalk eval passkey --lengths 16k --depths 10 --samples 3 --method unmodified \
    --method "selfextend(group_size={2, 4, 8, 16, 32}, window={512, 1024, 2048, 4096})" \
    --batch-size 10 --output docs/results/passkey-sweep
ropewalk eval perplexity --data-dir data --lengths 16k --books 15 --windows 2 --method unmodified \
    --method "selfextend(group_size={2, 4, 8, 16, 32}, window={512, 1024, 2048, 4096})" \
    --batch-size 2 --chunk 32768 --output docs/results/perplexity-sweep

# Exams and long-text tasks (tables 2 and 3)
ropewalk eval leval --mode options --data-dir data --length 16k \
    --method unmodified --method selfextend --method self --method yarn \
    --batch-size 2 --output docs/results/leval
ropewalk eval longbench --subset mini --data-dir data --length 15500 \
    --method unmodified --method selfextend --method yarn --batch-size 4 --output docs/results/longbench

# Short tasks, which should stay as they are
ropewalk eval short --questions 300 --data-dir data \
    --method unmodified --method "selfextend(group_size=8, window=1024)" --batch-size 16 --output docs/results/short

# A model trained on 32k, past that
ropewalk eval perplexity --model qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --data-dir data --lengths 16k,32k,48k,64k \
    --books 8 --windows 2 --method unmodified --method selfextend --method self --method rerope --method dynamic-ntk \
    --method yarn --method infinite --batch-size 2 --chunk 32768 --output docs/results/qwen-perplexity
ropewalk eval passkey --model qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --lengths 16k,32k,48k,64k --depths 10 --samples 1 \
    --method unmodified --method selfextend --method self --method yarn --chunk 32768 --output docs/results/qwen-passkey

# The pages
ropewalk report docs/results/perplexity --output docs/results/pages/perplexity.html
ropewalk report docs/results/perplexity-by-position --output docs/results/pages/perplexity-by-position.html
ropewalk report docs/results/passkey docs/results/passkey-length --output docs/results/pages/passkey.html
ropewalk report docs/results/start-passkey docs/results/start-perplexity --output docs/results/pages/start.html
ropewalk report docs/results/needle-sweep docs/results/passkey-sweep docs/results/perplexity-sweep \
    --output docs/results/pages/sweep.html
ropewalk report docs/results/leval docs/results/longbench docs/results/short --output docs/results/pages/tasks.html
ropewalk report docs/results/qwen-passkey docs/results/qwen-perplexity --output docs/results/pages/qwen.html

# What no page has, and the findings (findings.md.jinja) with their figures
python docs/results/comparisons.py
python docs/results/findings.py
