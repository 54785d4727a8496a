// The slider over the picture grids. A page that is rewritten in place calls showGrids() again: the
// slider stays at the grid that was looked at, or at the newest.
const grids = { looked: null };
function showGrids() {
  const slider = document.getElementById("grid-slider");
  const stage = document.getElementById("grid-stage");
  if (!slider || !stage) return;
  const frames = [...stage.querySelectorAll("figure")];
  const caption = (frame) => frame.querySelector("figcaption");
  const show = () => {
    const at = Number(slider.value);
    frames.forEach((frame, i) => { frame.hidden = i !== at; });
    document.getElementById("grid-output").innerHTML = caption(frames[at]).innerHTML;
    slider.setAttribute("aria-valuetext", caption(frames[at]).textContent);
  };
  const kept = frames.findIndex((frame) => caption(frame).firstChild.textContent === grids.looked);
  slider.value = kept < 0 ? frames.length - 1 : kept;
  slider.oninput = () => {
    const at = Number(slider.value);
    grids.looked = at < frames.length - 1 ? caption(frames[at]).firstChild.textContent : null;
    show();
  };
  document.getElementById("grid-control").hidden = false;
  show();
}
showGrids();
