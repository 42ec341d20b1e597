rule prepare:
    """Source -> uint8 arrays, fixed splits, class means, data card."""
    input:
        unpack(inputs("prepare")),
    output:
        **outputs("prepare"),
    log:
        log_of("prepare"),
    benchmark:
        benchmark_of("prepare")
    conda:
        "../envs/ebjdat.yaml"
    params:
        command=command("prepare"),
        depends_on=depends_on("prepare"),
        listing=listing(PROFILE.data.path, PROFILE.data.extra),
    shell:
        "python -m ebjdat {params.command} 2>&1 | tee -i {log}"
