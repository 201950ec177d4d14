// The race of all stages to recognise the same digits: a clock runs, and digits light up.
const race = document.getElementById("race");
if (race && page.recognition?.stages) {
  const {digits, stages} = page.recognition, slider = document.getElementById("race-at");
  const go = document.getElementById("race-go"), clock = document.getElementById("race-clock");
  const speed = document.getElementById("race-speed");
  const moments = stages.flatMap(stage => stage.images.map(images => images * stage.seconds));
  const first = Math.min(...moments.filter(moment => moment > 0)) / 2, end = Math.max(...moments);

  const rows = stages.map(stage => {
    const row = document.createElement("div"), name = document.createElement("div"), dots = document.createElement("div");
    const chip = document.createElement("span");
    row.className = "race-row"; dots.className = "dots"; chip.className = "chip";
    chip.style.background = stage.color;
    name.append(chip, stage.title + (stage.borrowed ? " (extrapolated)" : ""));
    const tiles = digits.map(digit => {
      const tile = document.createElement("canvas");
      tile.width = tile.height = 28;
      if (digit.hard) tile.classList.add("hard");
      const image = new ImageData(28, 28);
      bytesOf(digit.pixels).forEach((byte, i) => image.data.set([0, 0, 0, byte], 4 * i));
      tile.getContext("2d").putImageData(image, 0, 0);
      tile.setAttribute("role", "img");
      dots.append(tile);
      return tile;
    });
    row.append(name, dots);
    document.getElementById("race-rows").append(row);
    return {stage, tiles};
  });

  // The slider is logarithmic: from the first step of the fastest stage to the last of the slowest.
  const momentOf = place => place ? first * (end / first) ** (place / 1000) : 0;
  const placeOf = moment => moment > first ? 1000 * Math.log(moment / first) / Math.log(end / first) : 0;

  function written(seconds) {
    for (const [unit, name] of [[3600, "h"], [60, "min"]])
      if (seconds >= 2 * unit) return `${(seconds / unit).toPrecision(3)} ${name}`;
    for (const [unit, name] of [[1, "s"], [1e-3, "ms"]])
      if (seconds >= unit) return `${(seconds / unit).toPrecision(3)} ${name}`;
    return `${(seconds * 1e6).toFixed(0)} µs`;
  }

  function show(moment) {
    clock.textContent = written(moment);
    for (const {stage, tiles} of rows) {
      const look = stage.images.findLastIndex(images => images * stage.seconds <= moment);
      tiles.forEach((tile, i) => {
        const belief = look < 0 ? null : stage.beliefs[i][look], right = belief === digits[i].label;
        tile.classList.toggle("right", right);
        tile.setAttribute("aria-label", `a ${digits[i].label}, ${belief === null ? "not seen" : right ? "recognised" : `taken for a ${belief}`}`);
      });
    }
  }

  let running = null;
  const stop = () => { cancelAnimationFrame(running); running = null; go.textContent = "Start"; };
  go.addEventListener("click", () => {
    if (running !== null) return stop();
    go.textContent = "Stop";
    let moment = Number(slider.value) >= 1000 ? 0 : momentOf(Number(slider.value)), before = performance.now();
    const frame = now => {
      moment += Math.max(0, now - before) / 1000 * Number(speed.value);
      before = now;
      slider.value = placeOf(moment);
      show(moment);
      if (moment < end) running = requestAnimationFrame(frame);
      else stop();
    };
    running = requestAnimationFrame(frame);
  });
  slider.addEventListener("input", () => { if (running !== null) stop(); show(momentOf(Number(slider.value))); });
  // who wants no motion moves the slider: nothing runs by itself
  show(0);
}
