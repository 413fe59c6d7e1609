// The dialog that asks before something is changed.

const dialog = document.querySelector("dialog");
const find = (selector) => dialog.querySelector(selector);

/**
 * Ask; `act(force)` is called when the answer is yes, and the dialog stays while it fails.
 * `force` are the words of a way around a refusal with 409, offered once there was one.
 */
export function confirm({ title, what, yes, force, act }) {
  find("h2").textContent = title;
  find(".what").textContent = what;
  find(".error").textContent = "";
  find(".force").hidden = true;
  find(".force input").checked = false;
  find(".force span").textContent = force ?? "";
  const button = find(".confirm");
  button.textContent = yes;
  button.disabled = false;
  find("form").onsubmit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    find(".error").textContent = "";
    try {
      await act(find(".force input").checked);
      dialog.close();
    } catch (error) {
      find(".error").textContent = error.message;
      find(".force").hidden = !(force && error.status === 409);
    }
    button.disabled = false;
  };
  dialog.showModal();
  // What changes nothing has the focus first.
  find(".cancel").focus();
}

find(".cancel").addEventListener("click", () => dialog.close());

/** Whatever was asked is moot. */
export const withdraw = () => dialog.close();
