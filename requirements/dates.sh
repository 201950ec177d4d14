# Prints the locks (requirements/NAME.txt) and their stamps (FOLDER/NAME) whose dates are in the future,
# because the clock was wrong. Such a stamp is removed, since it would hide a later change of its lock.
# Such a lock is given the present date, since every call would install it again.
#   sh requirements/dates.sh FOLDER
now=$(mktemp 2>/dev/null) || exit 0
for lock in requirements/*.txt; do
  stamp=$1/$(basename "$lock" .txt)
  if [ "$stamp" -nt "$now" ]; then rm -f "$stamp" && echo "$stamp"; fi
  if [ "$lock" -nt "$now" ]; then touch "$lock" && echo "$lock"; fi
done
rm -f "$now"
