# shellcheck shell=bash
# What the scripts for machines elsewhere share: commands that --dry-run shows instead of running
# them, and quoting. Sourced after environment.sh, with the script's own arguments, from which it
# takes --dry-run away.

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
esac
dry_run=no
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
# Anywhere else it would be lost, and a machine made or deleted that was only to be looked at.
for word in "$@"; do
  [ "$word" != --dry-run ] || fail '--dry-run stands before the first word'
done

# Prints its arguments as words that a shell reads back as they were.
quoted() {
  local word line=
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/\'\\\'\'}'" ;;
    esac
    line="$line $word"
  done
  printf '%s\n' "${line# }"
}

execute() {
  if [ "$dry_run" = yes ]; then
    quoted "$@"
  else
    "$@"
  fi
}

temporary_folder() {
  if [ "$dry_run" = yes ]; then
    echo /tmp/adapters_jax
  else
    mktemp -d
  fi
}

# need NAME MEANING: fails unless the variable of that name is set.
need() {
  [ -n "${!1:-}" ] || fail "$1 is not set: give $2 in the environment or in launch/env"
}

# no_more WORD ...: fails where words are left over, which nothing would read.
no_more() {
  [ $# = 0 ] || fail "unexpected argument '$1'; settings are variables (see launch/env.example)"
}

# Whether the words are a command that trains or evaluates; anything else would be found out remotely.
check_command() {
  case ${1:-} in
    train | evaluate | sweep | predict | convert | experiments.[a-z]*) ;;
    *)
      fail 'expected train, evaluate, sweep, predict, convert or experiments.NAME after the name,' \
        "got '${1:-}'"
      ;;
  esac
}

# What stays here: only commits travel, so that every result can be traced to one.
tell_uncommitted() {
  [ -z "$(git -C "$ROOT" status --porcelain)" ] ||
    say 'uncommitted changes stay here; only what is committed is sent'
}
