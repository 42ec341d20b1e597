rule attack:
    """Clean accuracy, PGD-20, AutoAttack standard."""
    input:
        data=DATA,
        checkpoint=f"{CHECKPOINTS}/{{experiment}}/seed{{seed}}.safetensors",
        code=CODE["attack"],
    output:
        metrics=f"{RESULTS}/{{experiment}}/seed{{seed}}/attack.json",
    log:
        f"{LOGS}/{{experiment}}/seed{{seed}}/attack.log",
    benchmark:
        f"{BENCHMARKS}/{{experiment}}/seed{{seed}}/attack.tsv"
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        settings=SETTINGS,
        sections=sections("evaluation.attack"),
    shell:
        "python -m ebjdat attack {params.settings} --experiment {wildcards.experiment} --seed {wildcards.seed} --threads {threads}"
        " --data {input.data} --weights {input.checkpoint} --out {output.metrics}"
        " 2>&1 | tee -i {log}"


rule generate:
    """Fresh chains and the replay buffer: pictures, and how they compare with real images."""
    input:
        data=DATA,
        checkpoint=f"{CHECKPOINTS}/{{experiment}}/seed{{seed}}.safetensors",
        reference=f"{CHECKPOINTS}/{REFERENCE.experiment}/seed{REFERENCE.seed}.safetensors",
        code=CODE["draw"],
    output:
        metrics=f"{RESULTS}/{{experiment}}/seed{{seed}}/generate.json",
        samples=f"{RESULTS}/{{experiment}}/seed{{seed}}/samples.npz",
        grid=report(
            f"{RESULTS}/{{experiment}}/seed{{seed}}/samples.png",
            caption="../report/samples.rst",
            category="Samples",
            labels={"experiment": "{experiment}", "seed": "{seed}"},
        ),
        chains=report(
            f"{RESULTS}/{{experiment}}/seed{{seed}}/chains.gif",
            caption="../report/chains.rst",
            category="Samples",
            labels={"experiment": "{experiment}", "seed": "{seed}"},
        ),
    log:
        f"{LOGS}/{{experiment}}/seed{{seed}}/generate.log",
    benchmark:
        f"{BENCHMARKS}/{{experiment}}/seed{{seed}}/generate.tsv"
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        settings=SETTINGS,
        sections=sections("evaluation.generate"),
    shell:
        "python -m ebjdat generate {params.settings} --experiment {wildcards.experiment} --seed {wildcards.seed} --threads {threads}"
        " --data {input.data} --weights {input.checkpoint} --reference {input.reference}"
        " --out {output.metrics} --samples {output.samples} --grid {output.grid} --chains {output.chains}"
        " 2>&1 | tee -i {log}"


rule energy:
    """Energies of clean, adversarial and generated images, and their gaps."""
    input:
        data=DATA,
        checkpoint=f"{CHECKPOINTS}/{{experiment}}/seed{{seed}}.safetensors",
        samples=f"{RESULTS}/{{experiment}}/seed{{seed}}/samples.npz",
        code=CODE["draw"],
    output:
        metrics=f"{RESULTS}/{{experiment}}/seed{{seed}}/energy.json",
        values=f"{RESULTS}/{{experiment}}/seed{{seed}}/energy.npz",
        figure=report(
            f"{RESULTS}/{{experiment}}/seed{{seed}}/energy.png",
            caption="../report/energy.rst",
            category="Energies",
            labels={"experiment": "{experiment}", "seed": "{seed}"},
        ),
    log:
        f"{LOGS}/{{experiment}}/seed{{seed}}/energy.log",
    benchmark:
        f"{BENCHMARKS}/{{experiment}}/seed{{seed}}/energy.tsv"
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        settings=SETTINGS,
        sections=sections("evaluation.energy", "evaluation.attack"),
    shell:
        "python -m ebjdat energy {params.settings} --experiment {wildcards.experiment} --seed {wildcards.seed} --threads {threads}"
        " --data {input.data} --weights {input.checkpoint} --samples {input.samples}"
        " --out {output.metrics} --values {output.values} --figure {output.figure}"
        " 2>&1 | tee -i {log}"
