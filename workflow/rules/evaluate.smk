rule attack:
    """Clean accuracy, PGD and the ensembles of every protocol, with integrity checks."""
    input:
        unpack(inputs("attack")),
    output:
        **outputs("attack"),
    log:
        log_of("attack"),
    benchmark:
        benchmark_of("attack")
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        command=command("attack"),
        depends_on=depends_on("attack"),
    shell:
        "python -m ebjdat {params.command} --threads {threads} 2>&1 | tee -i {log}"


rule generate:
    """Fresh chains and the replay buffer: pictures, and how they compare with real images."""
    input:
        unpack(inputs("generate")),
    output:
        **outputs("generate", category="Samples", grid="samples", chains="chains"),
    log:
        log_of("generate"),
    benchmark:
        benchmark_of("generate")
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        command=command("generate"),
        depends_on=depends_on("generate"),
    shell:
        "python -m ebjdat {params.command} --threads {threads} 2>&1 | tee -i {log}"


rule energy:
    """Energies of clean, adversarial and generated images, and their gaps."""
    input:
        unpack(inputs("energy")),
    output:
        **outputs("energy", category="Energies", figure="energy"),
    log:
        log_of("energy"),
    benchmark:
        benchmark_of("energy")
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        command=command("energy"),
        depends_on=depends_on("energy"),
    shell:
        "python -m ebjdat {params.command} --threads {threads} 2>&1 | tee -i {log}"


rule reliability:
    """Calibration, and detection of out-of-distribution and adversarial images."""
    input:
        unpack(inputs("reliability")),
    output:
        **outputs("reliability", category="Reliability", figure="reliability"),
    log:
        log_of("reliability"),
    benchmark:
        benchmark_of("reliability")
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        command=command("reliability"),
        depends_on=depends_on("reliability"),
        listing=listing(PROFILE.evaluation.reliability.ood_path),
    shell:
        "python -m ebjdat {params.command} --threads {threads} 2>&1 | tee -i {log}"


rule teacher:
    """What a student's teacher says of training images that adversarial training does not learn."""
    input:
        unpack(inputs("teacher")),
    output:
        **outputs("teacher"),
    log:
        log_of("teacher"),
    benchmark:
        benchmark_of("teacher")
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        command=command("teacher"),
        depends_on=depends_on("teacher"),
    shell:
        "python -m ebjdat {params.command} --threads {threads} 2>&1 | tee -i {log}"
