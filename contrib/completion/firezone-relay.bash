# Completion of firezone-relay for bash. Written by "python -m contrib.generate" from bash.in.
#
# For this shell:  source contrib/completion/firezone-relay.bash
# For everyone, with the package bash-completion:
#   install -D -m 0644 contrib/completion/firezone-relay.bash \
#       /usr/local/share/bash-completion/completions/firezone-relay

_firezone_relay() {
    local at=$((COMP_CWORD - 1)) word=${COMP_WORDS[COMP_CWORD]} before= words=
    COMPREPLY=()
    # In COMP_WORDS "=" is a word of its own. Wanted is the flag before it, of --flag=value and of
    # --log-level info,relay.turn=debug alike.
    if [[ $word == "=" ]]; then
        at=$COMP_CWORD word=
    fi
    while ((at > 0)) && [[ ${COMP_WORDS[at]} == "=" ]]; do
        ((at -= 1))
        [[ ${COMP_WORDS[at]} == -* ]] || ((at -= 1))
    done
    if [[ ${COMP_WORDS[1]} == probe ]] && ((COMP_CWORD > 1)); then
        if [[ ${COMP_WORDS[at]} == --*-file* || ${COMP_WORDS[at]} == --ice-servers ]]; then
            compopt -o default
            return
        fi
        words='-h --help --username --credential --credential-file --auth-secret-file
            --relay-secret-file --ice-servers --conformance --json --strict --address -4 -6
            --ca-file --timeout --seconds --max-rate'
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
        return
    fi
    if [[ $word == *,* ]]; then
        before=${word%,*}, word=${word##*,}
    fi
    case ${COMP_WORDS[at]} in
        --tls-cert | --tls-key | --token-file | --relay-secret-file | --auth-secret-file | --users-file | -c | --config)
            compopt -o default # the names of files
            return
            ;;
        --refused-peers) words='error ignore' ;;
        --log-format) words='human json' ;;
        --log-level) words='debug info warning error' ;;
        --harden) words='auto require off' ;;
        --channel-range) words='rfc8656 rfc5766' ;;
        --offload) words='auto off' ;;
        --copy-tos) words='auto on off' ;;
        --xdp) words='off auto require generic' ;;
        --print-credential | --no-print-credential | \
        --send-indications | --no-send-indications | \
        --one-allocation-per-username | --no-one-allocation-per-username | \
        --check-config | \
        --print-config | \
        --version | \
        -h | --help | [!-]*)
            words='--public-ip4-addr --public-ip6-addr --bind-ip4-addr --bind-ip6-addr --listen-port
            --lowest-port --highest-port --tcp-port --tls-port --tls-cert --tls-key
            --proxy-protocol-from --token-file --api-url --name --relay-secret-file
            --auth-secret-file --users-file --realm --print-credential --no-print-credential
            --mint --mint-user --allow-peer --deny-peer --refused-peers --send-indications
            --no-send-indications --one-allocation-per-username --no-one-allocation-per-username
            --max-allocations --max-allocations-per-username --max-allocations-per-ip
            --max-channels-per-allocation --max-connections --max-connections-per-ip
            --unauthenticated-rate --unauthenticated-rate-per-prefix --log-format --log-level
            --http-addr --harden --user --drain-timeout --channel-range --offload --copy-tos
            --xdp --xdp-device --software --rng-seed -c --config --check-config --print-config
            --upgrade --version -h --help'
            ;;
    esac
    mapfile -t COMPREPLY < <(compgen -P "$before" -W "$words" -- "$word")
}

complete -F _firezone_relay firezone-relay relay.py
