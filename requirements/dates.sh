# Prints the locks (requirements/NAME.txt) and their stamps (FOLDER/NAME) that are dated in the future,
# where the clock was wrong. A stamp is removed: it would hide that its lock has changed since. A lock
# is dated now: it would be installed by every call.
#   sh requirements/dates.sh FOLDER
now=$(mktemp 2>/dev/null) || exit 0
for lock in requirements/*.txt; do
  stamp=$1/$(basename "$lock" .txt)
  if [ "$stamp" -nt "$now" ]; then rm -f "$stamp" && echo "$stamp"; fi
  if [ "$lock" -nt "$now" ]; then touch "$lock" && echo "$lock"; fi
done
rm -f "$now"
