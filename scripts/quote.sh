# Sourced by slurm/train.sbatch and tpu/pod.
# shellcheck shell=bash

# quote WORD...: prints a command as a shell reads it, on one line.
quote() {
  local word single="'" escaped="'\\''" separator=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,~-]*) word=\'${word//$single/$escaped}\' ;;
    esac
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
  echo
}
